"""A report as one self-contained HTML page: sortable tables, embedded figures, no network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from offrl.results.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
html { background: #fff }
body { font: 14px/1.45 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #e3e3e3; white-space: nowrap }
th.word, td.word { text-align: left }
td.word { white-space: normal; overflow-wrap: anywhere; min-width: 7em }
th { position: sticky; top: 0; background: #f6f6f6; border-bottom: 1px solid #999; padding: 0 }
th button { font: inherit; font-weight: 600; background: none; border: 0; padding: .35em .7em; cursor: pointer; width: 100%;
  text-align: inherit; white-space: normal }
th button:hover { background: #e9e9e9 }
th[aria-sort=ascending] button::after { content: " \\25B2" } th[aria-sort=descending] button::after { content: " \\25BC" }
tbody tr:hover { background: #f9f9f2 }
img { max-width: 100%; height: auto } li { margin: .2em 0 } .note { color: #555; font-size: .92em }
"""

# A click sorts by a column, the next click reverses; numbers by value, other cells alphabetically, empty cells last.
SCRIPT = """
const valueOf = cell => {
  const text = cell.textContent.trim(), plain = text.replace(/,/g, '').replace('\\u2212', '-');
  const [, digits, unit] = /^(-?[\\d.]+)([kM](?!\\w))?/.exec(plain) || [];
  const number = parseFloat(digits) * ({k: 1e3, M: 1e6}[unit] || 1);
  return text === '' || text === '\\u2013' ? null : Number.isNaN(number) ? text.toLowerCase() : number;
};
const before = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === 'number' ? -1 : 1;
for (const heading of document.querySelectorAll('th')) heading.querySelector('button').onclick = () => {
  const table = heading.closest('table'), body = table.tBodies[0], column = heading.cellIndex;
  const down = heading.getAttribute('aria-sort') === 'ascending';
  for (const other of table.querySelectorAll('th')) other.removeAttribute('aria-sort');
  heading.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const rows = [...body.rows].map(row => [valueOf(row.cells[column]), row]);
  rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : down ? before(b, a) : before(a, b));
  body.append(...rows.map(([, row]) => row));
};
"""


def page(
    title: str, made: Sequence[Table], drawn: Sequence[tuple[str, Figure]], notes: Sequence[str], introduction: str = ""
) -> str:
    """The page's text.

    Args:
        introduction: what was run and what the numbers mean.
        drawn: headings and figures, embedded as SVG.
        notes: meaning of marks and columns, and sources.
    """
    parts = [_table(table) for table in made]
    parts += [f'<h2>{html.escape(name)}</h2>\n<img alt="{html.escape(name)}" src="{_svg(f)}">' for name, f in drawn]
    items = "\n".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f"<body>\n<h1>{html.escape(title)}</h1>\n<p>{html.escape(introduction)}</p>\n" + "\n".join(parts) + "\n"
        f'<h2>How to read this</h2>\n<ul class="note">\n{items}\n</ul>\n<script>{SCRIPT}</script>\n</body></html>\n'
    )


def _table(table: Table) -> str:
    words = [
        not any(row[i][:1].isdigit() or row[i][:1] in "+-−" for row in table.rows) for i in range(len(table.columns))
    ]

    def cell(tag: str, i: int, inner: str) -> str:
        return f"<{tag}{' class=word' if words[i] else ''}>{inner}</{tag}>"

    head = "".join(cell("th", i, f"<button>{html.escape(name)}</button>") for i, name in enumerate(table.columns))
    lines = []
    for row, bold in zip(table.rows, table.bold):
        texts = [f"<b>{html.escape(text)}</b>" if i in bold else html.escape(text) for i, text in enumerate(row)]
        lines.append("<tr>" + "".join(cell("td", i, text) for i, text in enumerate(texts)) + "</tr>")
    body = "\n".join(lines)
    return (
        f"<h2>{html.escape(table.title)}</h2>\n<div class=wide><table>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _svg(figure: Figure) -> str:
    """The figure as a data URL: inside an image its identifiers do not clash with another figure's."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "offrl"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
