"""A report as one self-contained HTML page of tables and pictures, which loads nothing else."""

import base64
import html
from typing import NamedTuple

from ada_jax import paths
from ada_jax.report import tables
from ada_jax.report.tables import Cell, Table


class Picture(NamedTuple):
    """A PNG for the page."""

    path: str
    alt: str  # Text alternative.
    caption: str
    section: str  # 'figures' or 'pairs'.


_SECTIONS = {"figures": "Figures", "pairs": "Clean and augmented images"}

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6472; --line: #d9dde4;
  --paper: #fff; --band: #f4f6f9; --mark: #1f5fbf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa4b2; --line: #343b47;
  --paper: #14181f; --band: #1c222c; --mark: #7fb0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 82rem;
  background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; list-style: none; }
a { color: var(--mark); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .55rem; text-align: left; white-space: nowrap; }
.number { text-align: right; }
thead th { border-bottom: 1px solid var(--line); background: var(--band); color: var(--soft);
  font-weight: 600; vertical-align: bottom; white-space: normal; }
tbody { border-bottom: 1px solid var(--line); }
tbody th { position: sticky; left: 0; background: var(--paper); font-weight: 500; }
tbody tr + tr > * { color: var(--soft); font-size: .8125rem; padding-top: 0; }
.notes { color: var(--soft); font-size: .875rem; padding-left: 1.1rem; overflow-wrap: anywhere; }
figure { margin: 0 0 2rem; }
figure img { display: block; width: 100%; min-width: 44rem; background: #fff; }
figcaption { color: var(--soft); font-size: .875rem; margin-top: .5rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  table { font-size: .8125rem; }
  th, td { padding-left: .35rem; padding-right: .35rem; }
  tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 7.5rem; }
}
"""


def page(title: str, shown: list[Table], pictures: list[Picture]) -> str:
    """Makes the HTML page; pictures are embedded in it.

    Args:
      title: heading of the page.
      shown: tables, in order.
      pictures: pictures, in order.
    """
    parts = [(f"table{i}", table.title, _table(table)) for i, table in enumerate(shown)]
    for section, heading in _SECTIONS.items():
        if drawn := [_figure(p) for p in pictures if p.section == section]:
            parts.append((section, heading, "\n".join(drawn)))
    links = "".join(f'<li><a href="#{key}">{html.escape(name)}</a></li>' for key, name, _ in parts)
    sections = "\n".join(
        f'<section id="{key}"><h2>{html.escape(name)}</h2>\n{body}\n</section>'
        for key, name, body in parts
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{html.escape(title)}</h1>
<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main>
{sections}
</main>
</body>
</html>
"""


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{_align(cell)}>{html.escape(name)}</th>'
        for name, cell in zip(table.head, _samples(table), strict=True)
    )
    bodies = "\n".join(f"<tbody>{''.join(map(_line, group))}</tbody>" for group in table.groups)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    return (
        f'<div class="scroll" role="region" aria-label="{html.escape(table.title)}" tabindex="0">\n'
        f"<table><thead><tr>{head}</tr></thead>\n{bodies}\n</table></div>"
        + (f'\n<ul class="notes">{notes}</ul>' if notes else "")
    )


def _samples(table: Table) -> list[Cell]:
    """The first non-empty cell of each column."""
    columns = zip(*table.lines, strict=True)
    return [next((c for c in column if c.value is not None), Cell()) for column in columns]


def _line(line: list[Cell]) -> str:
    head, *rest = (html.escape(tables.text(cell)) for cell in line)
    cells = (f"<td{_align(c)}>{word}</td>" for c, word in zip(line[1:], rest, strict=True))
    return f'<tr><th scope="row">{head}</th>{"".join(cells)}</tr>'


def _align(cell: Cell) -> str:
    return ' class="number"' if isinstance(cell.value, int | float) else ""


def _figure(picture: Picture) -> str:
    data = base64.b64encode(paths.read(picture.path)).decode()
    return (
        f'<figure><div class="scroll" role="region" aria-label="Figure" tabindex="0">'
        f'<img src="data:image/png;base64,{data}" alt="{html.escape(picture.alt)}"></div>\n'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )
