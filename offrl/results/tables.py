"""The text of a report: tables for a terminal, Markdown and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offrl.results import budget, stats
from offrl.results.aggregates import Report
from offrl.results.cells import BOLD_SEEDS, Cell, count
from offrl.results.published import Published

if TYPE_CHECKING:
    from rich.text import Text


def number(value: float, digits: int = 1) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _plus_minus(mean: float, std: float, digits: int = 1) -> str:
    return number(mean, digits) + ("" if math.isnan(std) else f" ± {std:.{digits}f}")


def _interval(interval: tuple[float, float], digits: int = 1) -> str:
    low, high = interval
    return "–" if math.isnan(low) else f"{low:.{digits}f} to {high:.{digits}f}"


def _between(bounds: tuple[int, int]) -> str:
    low, high = (count(bound) for bound in bounds)
    return low if low == high else f"{low}–{high}"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column groups the rows (unless `flat`), the second names them.

    Attributes:
        bold: for each row the columns in bold; empty: none in any row.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    bold: list[set[int]] = field(default_factory=list)
    flat: bool = False

    def __post_init__(self) -> None:
        if not self.bold:
            object.__setattr__(self, "bold", [set() for _ in self.rows])

    def filled(self) -> Table:
        """The table without its empty columns."""
        kept = [i for i in range(len(self.columns)) if any(row[i] for row in self.rows)]
        bold = [{kept.index(i) for i in row} for row in self.bold]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table(self.title, [self.columns[i] for i in kept], rows, bold, self.flat)

    def markdown(self) -> str:
        lines = [f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]
        for row, bold in zip(self.rows, self.bold):
            cells = [f"**{text}**" if i in bold else text for i, text in enumerate(row)]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        return f"## {self.title}\n\n" + "\n".join(lines) + "\n"

    def latex(self) -> str:
        """A `table`, or a `longtable` if it is longer than a page; needs the packages booktabs and longtable."""
        lines = []
        for row, bold in zip(self.rows, self.bold):
            cells = [f"\\textbf{{{_tex(text)}}}" if i in bold else _tex(text) for i, text in enumerate(row)]
            lines.append(" & ".join(cells) + r" \\")
        columns = " & ".join(map(_tex, self.columns))
        head = ["\\toprule", columns + r" \\", "\\midrule"]
        shape = "ll" + "r" * (len(self.columns) - 2) if len(self.columns) > 1 else "l"
        caption = f"\\caption{{{_tex(self.title)}}}"
        if len(lines) > _PAGE:
            begin = [f"\\begin{{longtable}}{{{shape}}}", caption + r" \\", *head, "\\endhead"]
            begin += ["\\bottomrule", "\\endfoot"]
            return "\n".join([*begin, *lines, "\\end{longtable}"]) + "\n"
        begin = ["\\begin{table}", "\\centering", caption, f"\\begin{{tabular}}{{{shape}}}", *head]
        return "\n".join([*begin, *lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"]) + "\n"


_PAGE = 40  # most rows of a LaTeX table on a page

_TEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "–": "--", "×": r"$\times$", "†": r"$\dagger$", "‡": r"$\ddagger$"}
_TEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", **{c: "\\" + c for c in "&%$#_{}"}}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def _score_table(report: Report, footnotes: Sequence[str]) -> Table:
    most = max(cell.k for cell in report.cells)
    rows, bold = [], []
    for cell in report.cells:
        row = [cell.dataset, cell.method, _last(cell), _interval(cell.interval, _digits(cell))]
        average = _plus_minus(*stats.mean_std(cell.average), _digits(cell))
        row.append(average + (f" ({cell.k})" if cell.k < most else ""))
        row.append(_with_note(cell.published[0], footnotes) if cell.published else "")
        row.append(_difference(cell))
        row.append(f"{len(cell.seeds)} × {_between(cell.episodes)}")
        row.append(_between(cell.steps) + (f" of {count(cell.budget)}" if cell.short else ""))
        rows.append(row)
        bold.append({2} if cell.bold else set())
    scales = ", ".join(sorted({cell.scale for cell in report.cells}))
    columns = [
        "dataset",
        "method",
        "last",
        "95 % interval",
        f"last {most}",
        "published",
        "difference",
        "S × E",
        "updates",
    ]
    return Table(f"Scores ({scales})", columns, rows, bold)


def _difference(cell: Cell) -> str:
    points, errors = cell.difference
    return "" if math.isnan(points) else f"{points:+.1f}" + ("" if math.isnan(errors) else f" ({errors:+.1f} s.e.)")


def _digits(cell: Cell) -> int:
    return 1 if cell.normalized or abs(cell.mean) >= 10 else 2  # AntMaze's raw returns lie between 0 and 1


def _last(cell: Cell) -> str:
    return _plus_minus(cell.mean, cell.std, _digits(cell)) + cell.marks


def _with_note(number: Published, footnotes: Sequence[str]) -> str:
    return f"{number} [{footnotes.index(number.cite()) + 1}]"


def _summary_table(report: Report) -> Table | None:
    """Datasets down, methods across, as papers print it; only where there is more than one of both."""
    methods = sorted({cell.method for cell in report.cells})
    datasets = list(dict.fromkeys(cell.dataset for cell in report.cells))
    if len(methods) < 2 or len(datasets) < 2:
        return None
    found = {(cell.dataset, cell.method): cell for cell in report.cells}
    rows, bold = [], []
    for dataset in datasets:
        row = [found.get((dataset, method)) for method in methods]
        rows.append([dataset, *(_last(cell) if cell else "" for cell in row)])
        bold.append({i + 1 for i, cell in enumerate(row) if cell and cell.bold})
    for family in dict.fromkeys(aggregate.family for aggregate in report.aggregates):
        means = {a.method: a for a in report.aggregates if a.family == family}
        most = max((a.datasets for a in means.values()), key=len)
        # A mean over other datasets is no rival of one over these.
        cells = [number(means[m].mean) if m in means and means[m].datasets == most else "" for m in methods]
        rows.append([f"mean of {len(most)}, {family}", *cells])
        bold.append(set())
    return Table("Summary", ["dataset", *methods], rows, bold)


def _aggregate_table(report: Report) -> Table:
    rows = [
        [
            *(a.family, a.method, str(len(a.datasets)), str(a.seeds)),
            *(number(a.mean), number(a.iqm), _interval(a.interval), number(a.gap)),
        ]
        for a in report.aggregates
    ]
    columns = ["family", "method", "datasets", "seeds", "mean", "IQM", "95 % interval of the IQM", "gap to 100"]
    return Table("Aggregates", columns, rows)


def _comparison_table(report: Report) -> Table:
    rows = [
        [
            c.family,
            f"{c.better} against {c.other}",
            str(c.datasets),
            str(c.seeds),
            f"{c.probability:.2f} ({c.probability_interval[0]:.2f} to {c.probability_interval[1]:.2f})",
            f"{number(c.difference)} ({_interval(c.difference_interval)})",
            c.verdict,
        ]
        for c in report.comparisons
    ]
    columns = ["family", "methods", "datasets", "seeds", "probability of improvement", "difference of IQM", "verdict"]
    return Table("Comparisons", columns, rows)


def _tuning_table(report: Report) -> Table:
    ks = sorted({k for tuning in report.tunings for k in tuning.best})
    notes = _footnotes(report)
    rows = []
    for t in report.tunings:
        best = [_plus_minus(*t.best[k]) if k in t.best else "" for k in ks]
        curve = [number(float(t.bandit.mean[n - 1])) if t.bandit else "" for n in budget.PULLS]
        rows.append(
            [t.where, t.method, str(t.configurations), *best, *curve, number(t.bandit.limit) if t.bandit else ""]
        )
        if t.published:
            cells = [str(t.published[k]) if k in t.published else "" for k in ks]
            name = f"{t.method}, published [{notes.index(t.published[min(t.published)].cite()) + 1}]"
            rows.append([t.where, name, "", *cells, *("" for _ in budget.PULLS), ""])
    columns = [
        "dataset",
        "method",
        "settings",
        *(f"best of {k}" for k in ks),
        *(f"{n} episodes" for n in budget.PULLS),
        "limit",
    ]
    return Table("Budget of online evaluations", columns, rows)


def _online_table(report: Report) -> Table:
    """The scores of checkpoints selected by their online scores: for comparison, never to be reported."""
    rows = [
        [
            *(cell.dataset, cell.method, _plus_minus(cell.mean, cell.std, _digits(cell))),
            *(_plus_minus(*stats.mean_std(scores), _digits(cell)) for scores in (cell.average, cell.best)),
            f"{cell.online:,}",
        ]
        for cell in report.cells
    ]
    columns = [
        "dataset",
        "method",
        "last",
        "mean of the last",
        "best (online_selected: true)",
        "episodes that it costs a seed",
    ]
    return Table("What the best checkpoint would say", columns, rows)


def _fine_tuning_table(report: Report) -> Table:
    """Scores before and after an online phase, for every seed too: a mean hides the ones that collapsed."""
    rows = []
    for tuned in report.fine_tunings:
        digits, theirs = _digits(tuned.cell), tuned.published
        before, after = (_plus_minus(*stats.mean_std(part), digits) for part in (tuned.before, tuned.after))
        pairs = zip(tuned.before, tuned.after)
        published = f"{theirs.before.mean:.1f} → {theirs.after.mean:.1f}" if theirs else ""
        if theirs and theirs.regret:
            published += f" ({theirs.regret.mean:.2f})"
        row = [tuned.dataset, tuned.method, f"{before} → {after}"]
        row.append(", ".join(f"{number(b, 0)}→{number(a, 0)}" for b, a in pairs))
        row.append(_plus_minus(*stats.mean_std(tuned.regret), 2) + ("" if tuned.by_success else " (score)"))
        rows.append([*row, f"{tuned.steps:,}", published])
    columns = ["dataset", "method", "offline → online", "seeds", "regret", "environment steps", "published (regret)"]
    return Table("Offline to online", columns, rows)


def _success_table(report: Report) -> Table:
    """Of sets that are scored by success: what OGBench's protocol reports, and how well the episodes tell the rate."""
    rows = []
    for cell in report.cells:
        if cell.successes is not None:
            low, high = stats.wilson_interval(cell.successes, cell.trials)
            rate = 100.0 * cell.successes / cell.trials if cell.trials else math.nan
            rows.append(
                [
                    *(cell.dataset, cell.method, f"{_plus_minus(*stats.mean_std(cell.average))} ({cell.k})"),
                    *(number(rate), f"{cell.successes} of {cell.trials}", _interval((100 * low, 100 * high))),
                ]
            )
    columns = ["dataset", "method", "protocol", "last, %", "successes", "95 % interval (Wilson)"]
    return Table("Success rates", columns, rows)


def introduction(report: Report) -> str:
    """What was run, and what a score means, in a few sentences."""
    cells = report.cells
    methods, datasets = sorted({c.method for c in cells}), list(dict.fromkeys(c.dataset for c in cells))
    seeds = _between((min(len(c.last) for c in cells), max(len(c.last) for c in cells)))
    steps = _between((min(c.steps[0] for c in cells), max(c.steps[1] for c in cells)))
    text = [
        f"{_listed(methods, 'methods')} on {_listed(datasets, 'datasets')}: {seeds} seed{'' if seeds == '1' else 's'} each, "
        f"scored after {steps} updates by episodes in the environment."
    ]
    if any(cell.scale.endswith("score") for cell in cells):
        text.append(
            "A score of 0 is the return of the lower reference, by custom a random policy's, and 100 that of the upper "
            "one, an expert's; higher is better."
        )
    if any(cell.scale == "return" for cell in cells):
        text.append(
            "A return is the sum of an episode's rewards; returns of different datasets have nothing in common."
        )
    return " ".join(text)


def _listed(names: Sequence[str], kind: str, most: int = 4) -> str:
    return (
        f"{len(names)} {kind}" if len(names) > most else " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    )


def all_tables(report: Report) -> list[Table]:
    """The tables that a terminal shows; those without rows are left out."""
    made = [
        _score_table(report, _footnotes(report)),
        _success_table(report),
        _aggregate_table(report),
        _comparison_table(report),
    ]
    return [table for table in [*made, _tuning_table(report), _fine_tuning_table(report)] if table.rows]


def full_tables(report: Report) -> list[Table]:
    """All tables: the summary, those of the terminal, and the best checkpoints."""
    summary = _summary_table(report)
    made = ([summary] if summary else []) + all_tables(report) + [_online_table(report)]
    return [table.filled() for table in made]


def latex(report: Report) -> str:
    """The text of report.tex: tables for a paper."""
    return "% needs \\usepackage{booktabs,longtable}\n" + "\n".join(table.latex() for table in full_tables(report))


def sources(report: Report) -> list[str]:
    """Sources of the published numbers, by their marks."""
    return [f"[{i}] {note}" for i, note in enumerate(_footnotes(report), start=1)]


def _footnotes(report: Report) -> list[str]:
    """Sources of the published numbers; those that the score table shows come first."""
    first = [cell.published[0].cite() for cell in report.cells if cell.published]
    others = [number.cite() for cell in report.cells for number in cell.published[1:]]
    tuned = [t.published[min(t.published)].cite() for t in report.tunings if t.published]
    online = [n.cite() for t in report.fine_tunings if t.published for n in (t.published.before, t.published.after)]
    return list(dict.fromkeys(first + tuned + others + online))


def legend(report: Report) -> list[str]:
    """Meaning of the columns and marks that occur, a sentence or two each."""
    most = max(cell.k for cell in report.cells)
    lines = [
        "last: mean ± standard deviation (ddof 1) over S seeds of the last evaluation, where a seed's score is its mean over "
        "E episodes. 95 % interval: Student's t over seeds.",
        f"last {most}: the same for the mean over a seed's last {most} evaluations"
        + (" (fewer: their number behind it)." if any(cell.k < most for cell in report.cells) else "."),
    ]
    if any(cell.bold for cell in report.cells):
        lines.append(
            f"Bold: the interval overlaps that of the dataset's best mean; only where both have at least {BOLD_SEEDS} seeds."
        )
    if any(cell.short for cell in report.cells):
        lines.append("† runs that have not reached their budget of updates.")
    if any(cell.unstable for cell in report.cells):
        lines.append(f"‡ unstable: the last score is more than 2 standard deviations from that of the last {most}.")
    if any(cell.successes is not None for cell in report.cells):
        lines.append(
            "protocol: OGBench's, the mean of a seed's last evaluations (their number behind it), mean ± std over seeds; it is "
            "what the difference compares. Wilson's interval is that of the last evaluation's episodes, of all seeds "
            "together: it tells nothing of other seeds."
        )
    if report.aggregates:
        lines.append(
            "IQM: interquartile mean of all seeds of all datasets; intervals by stratified bootstrap (2,000 resamples). "
            "seeds: the fewest of a dataset."
        )
    if any(cell.published for cell in report.cells):
        lines.append(
            "published: others' numbers under their protocols, sources in report.md; never averaged with ours. difference: "
            "ours minus theirs, and in standard errors (ours alone where they give no std or seeds)."
        )
    if report.fine_tunings:
        lines.append(
            "offline → online: mean ± std of the deterministic policy's scores at the switch and after the last environment "
            "step. regret: 1 - mean success over the episodes of the exploring policy; (score): of its score clipped to [0, "
            "100], where the environment tells no success. published: others' under their protocols, sources in report.md."
        )
    if report.tunings:
        lines.append(
            "Budget: best of k settings drawn uniformly (EOP, mean ± std of one practitioner's outcome); episodes: score of "
            "the policy that a UCB bandit on at most 8 policies recommends after that many; limit: score of the best of them. "
            "Settings are tuned per dataset, except in rows of a family."
        )
    return lines


def layout(table: Table) -> Text:
    """The table for a terminal; groups of the first column have lines of their own, so that most tables fit into 80 columns."""
    from rich.cells import cell_len
    from rich.text import Text

    shown = [i for i in range(0 if table.flat else 1, len(table.columns)) if any(row[i] for row in table.rows)]
    lines = [table.columns, *table.rows]
    width = {i: max(cell_len(line[i]) for line in lines) for i in shown}

    def line(cells: Sequence[str], style: str = "", bold: Collection[int] = ()) -> Text:
        text = Text("  ", style=style)
        for i in shown:
            space = " " * (width[i] - cell_len(cells[i]))
            cell = Text(cells[i], style="bold" if i in bold else "")
            text.append_text(Text.assemble(cell, space) if i == shown[0] else Text.assemble("  ", space, cell))
        return text

    heading = line(table.columns, "dim")
    text = Text.assemble((table.title, "bold"), "\n", heading, "\n", ("─" * heading.cell_len, "dim"), "\n")
    group = None
    for row, bold in zip(table.rows, table.bold):
        if row[0] != group and not table.flat:
            group = row[0]
            text.append(f"{group}\n", style="cyan")
        text.append_text(line(row, bold=bold)).append("\n")
    return text


def markdown(report: Report, figures: Mapping[str, str]) -> str:
    """The text of report.md.

    Args:
        figures: titles of the figures that lie beside it, by file name without .png.
    """
    parts = ["# Report\n", introduction(report) + "\n", *(table.markdown() for table in full_tables(report))]
    parts += ["\n".join(f"- {line}" for line in [*legend(report), *report.notes]) + "\n"]
    parts += ["## Figures\n", *(f"![{title}]({name}.png)\n" for name, title in figures.items())]
    footnotes = _footnotes(report)
    if footnotes:
        parts += [
            "## Published numbers\n\nOther protocols, often other simulator versions; never averaged with ours.\n"
        ]
        parts += ["\n".join(f"{i}. {note}" for i, note in enumerate(footnotes, start=1)) + "\n"]
        texts = [
            f"- {cell.method} on {cell.dataset}: " + ", ".join(_with_note(n, footnotes) for n in cell.published[1:])
            for cell in report.cells
            if cell.published[1:]
        ]
        parts += ["Further ones for the same cells:\n\n" + "\n".join(texts) + "\n"] if texts else []
    return "\n".join(parts)
